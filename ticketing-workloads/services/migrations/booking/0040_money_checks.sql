-- Rows that are there, without keeping anybody out: a validation takes no lock that a booking meets.
ALTER TABLE payment_attempts VALIDATE CONSTRAINT payment_attempts_state_check;
ALTER TABLE payment_attempts VALIDATE CONSTRAINT payment_attempts_object_check;
ALTER TABLE outbox VALIDATE CONSTRAINT outbox_kind_check;
