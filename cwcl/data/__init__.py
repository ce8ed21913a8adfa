"Drawn scenes, CholecSeg8k and your own frames: files, labels, splits, augmentation and batches."
