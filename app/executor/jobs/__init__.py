"""Operations on jobs: submit, read, cancel, retry, copy, compare, inference requests."""
