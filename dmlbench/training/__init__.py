"""How models are made robust: losses, samplings, defences, recipes, and the loop."""
