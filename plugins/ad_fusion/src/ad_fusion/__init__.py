"""Operations that belong together, computed as one, as a plugin of ad-core."""
