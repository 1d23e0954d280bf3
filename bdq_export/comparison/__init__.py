"""Many exports of one model in one table: methods, figures, and the file that a stopped comparison goes on from."""
