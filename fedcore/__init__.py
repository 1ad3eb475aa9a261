"""What every program shares. Kept empty of imports, so that importing a part stays cheap."""
