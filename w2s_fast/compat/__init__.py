"""The interfaces of other libraries over our bounds; each is imported only on use."""
