"""The paper's math-matching game as training data and as a judge: expert, texts, training and evaluation."""
