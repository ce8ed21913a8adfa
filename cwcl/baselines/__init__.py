"SimCLR and BYOL, the methods that the paper compares its own with."
