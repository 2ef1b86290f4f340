"""Resumable experiments: collect an atlas, verify plans, learn tasks in sequence."""
