"""What a training needs of a GPU, found without one: steps and frames run on fake CUDA tensors."""
