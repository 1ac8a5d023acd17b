"""Methods that learn representations: contrastive, from few labels, from bags, with rich features."""
