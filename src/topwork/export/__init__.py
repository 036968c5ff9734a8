"""An adapter or a model in the formats that other programs read, checked for each reader before and after."""
