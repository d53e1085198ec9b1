"""torture"""
