"""Blind review: people compare answers without knowing which model gave them. No torch."""
