"""The narrow kernel: widths up to 128 whose weights stay on the multiprocessor."""
