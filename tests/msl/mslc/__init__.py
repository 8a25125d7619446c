"""Metal Shading Language on Linux: tokens, declarations, lint, and the rewriting for clang."""
