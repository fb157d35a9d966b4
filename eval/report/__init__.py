"""Records as pages: tables, pictures, Markdown and HTML."""
