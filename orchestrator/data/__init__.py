"""Images, and where accuracies come from."""
