"Explorers for notebooks: figures with controls."
