-- Why a mail was not sent when it was tried last, in the words of the mail server, and why it was a dead letter before.
ALTER TABLE outbox ADD COLUMN last_error text;
