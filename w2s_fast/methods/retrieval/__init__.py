"""Methods that look something up: knowledge of a world for an agent, demonstrations for a reader."""
