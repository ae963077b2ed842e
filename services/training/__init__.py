"""Trains, evaluates and serves Matryoshka transcoders."""
