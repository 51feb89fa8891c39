"""The page in a browser: numbered instructions, a studio that makes pictures, and the page around it (extra "web")."""
