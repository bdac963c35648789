-- Rows that are there, without keeping anybody out: a validation takes no lock that a booking meets.
ALTER TABLE payment_attempts VALIDATE CONSTRAINT payment_attempts_state_check;
ALTER TABLE payment_attempts VALIDATE CONSTRAINT payment_attempts_object_check;
ALTER TABLE outbox VALIDATE CONSTRAINT outbox_kind_check;

-- "Not charged" was concluded from a search that lags: it is in doubt again. A payment that is charged stays as it is.
UPDATE payment_attempts a SET state = 'Begun'
WHERE state = 'NotCharged' AND NOT EXISTS (SELECT FROM payment_attempts c WHERE c.key = a.key AND c.state = 'Charged');

UPDATE bookings SET pending_since = created_at WHERE status = 'PaymentPending' AND pending_since IS NULL;
