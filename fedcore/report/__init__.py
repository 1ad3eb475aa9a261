"""A run as one self-contained HTML file: curves, sites, counts, impressions. No torch, no script, no
network.
"""
