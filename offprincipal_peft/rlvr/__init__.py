"""Runs methods under reinforcement learning with TRL's trainers and compares them."""
