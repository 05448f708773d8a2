"""`raytower refresh`: an encoder trained in rounds, each on negatives that the round before has mined."""
