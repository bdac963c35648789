-- For what payment looks up by what a provider calls it, and for the searches for charges of cancelled bookings. Built beside
-- buyers: no lock that a payment meets.
CREATE INDEX CONCURRENTLY IF NOT EXISTS payment_attempts_by_object ON payment_attempts (provider, object_id)
    WHERE object_id IS NOT NULL;
CREATE INDEX CONCURRENTLY IF NOT EXISTS payment_attempts_by_charge ON payment_attempts (provider, charge_id)
    WHERE charge_id IS NOT NULL;
-- Bookings that came to nothing, in the order in which they are looked through for charges.
CREATE INDEX CONCURRENTLY IF NOT EXISTS bookings_unpaid ON bookings (created_at, id)
    WHERE status = 'Cancelled' AND cancel_reason IN ('declined', 'payment timed out', 'payment unavailable');
-- Charges of a time, the latest ones among them.
CREATE INDEX CONCURRENTLY IF NOT EXISTS payment_attempts_charged ON payment_attempts (began_at) WHERE state = 'Charged';
-- What may still be charged: few at any time.
CREATE INDEX CONCURRENTLY IF NOT EXISTS payment_attempts_in_doubt ON payment_attempts (key)
    WHERE state IN ('Begun', 'NotCharged', 'Confirming', 'Reconfirming', 'NeedsBuyer');
