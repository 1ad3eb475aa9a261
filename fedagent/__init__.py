"""The agent of a site: dials out, trains on images that stay where they are, delivers updates."""
