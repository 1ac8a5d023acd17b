"""Methods for graphs, over any models of nodes; data as torch_geometric has it, which is not needed."""
