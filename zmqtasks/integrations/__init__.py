"""What lets programs written for other libraries run on a cluster unchanged; nothing here is imported by the core unasked."""
