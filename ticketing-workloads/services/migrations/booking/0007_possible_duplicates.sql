-- How often a mail left and nobody wrote down what became of it: each time may have sent it once more than needed.
ALTER TABLE outbox ADD COLUMN possible_duplicates integer NOT NULL DEFAULT 0;
