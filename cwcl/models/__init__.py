"The U-Net, and the heads on its encoder."
