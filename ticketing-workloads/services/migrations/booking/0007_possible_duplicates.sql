-- How often a mail may have left without anybody writing down what became of it: at most so many times it was sent once
-- more than needed.
ALTER TABLE outbox ADD COLUMN possible_duplicates integer NOT NULL DEFAULT 0;
