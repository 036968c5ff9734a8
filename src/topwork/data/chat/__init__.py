"""From conversations to tokens by the model's chat template: what is markup, what is learned, and the proof of it."""
