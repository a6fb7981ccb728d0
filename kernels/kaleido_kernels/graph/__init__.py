"""The graph path: any width, products by the vendor's library."""
