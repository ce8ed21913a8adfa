"The contrastive losses, and those of segmentation and presence, as functions of tensors."
