"""The foundation model seam: protocol helpers, engines, test models and decorators."""
