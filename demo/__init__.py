"""What the web demo shows, without the page: `app.py` adds layout and wiring."""
