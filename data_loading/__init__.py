"""data_loading"""
