"""What router.py stands on, floor by floor; tests/test_floors.py holds the floors."""
