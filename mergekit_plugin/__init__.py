"""`merge_method: phlora` for mergekit. Coming: nothing is here yet."""
