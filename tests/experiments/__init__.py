"""tests/experiments"""
