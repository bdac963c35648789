-- Rows that are there. In a step of its own, which locks these rows and not the tables: payments go on.
-- "Not charged" was concluded from a search that lags: it is in doubt again. A payment that is charged stays as it is.
UPDATE payment_attempts a SET state = 'Begun'
WHERE state = 'NotCharged' AND NOT EXISTS (SELECT FROM payment_attempts c WHERE c.key = a.key AND c.state = 'Charged');

UPDATE bookings SET pending_since = created_at WHERE status = 'PaymentPending' AND pending_since IS NULL;
