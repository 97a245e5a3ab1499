decoys=None
