"""Linear attention with decay: lightning and its kin, mLSTM, as a plugin of ad-core."""
