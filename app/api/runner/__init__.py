"""The routes that DeepExtension's backend calls, in the form that it knows (docs/runner.md)."""
