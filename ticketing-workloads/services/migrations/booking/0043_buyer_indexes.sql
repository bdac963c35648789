-- For the limits of buyers. Built beside buyers: no lock that a booking meets. Until they are there, nobody is counted.
-- The seats that somebody has of an event, what somebody holds, and the reservations of the last hours, each in one range.
-- `lower`: see step 12.
CREATE INDEX CONCURRENTLY IF NOT EXISTS bookings_by_owner ON bookings (owner, lower(status), event_id, created_at)
    WHERE owner IS NOT NULL;
CREATE INDEX CONCURRENTLY IF NOT EXISTS bookings_by_network ON bookings (network, lower(status), event_id, created_at)
    WHERE network IS NOT NULL;
-- Payments that were declined, the latest among them.
CREATE INDEX CONCURRENTLY IF NOT EXISTS bookings_declined_by_owner ON bookings (owner, pending_since)
    WHERE cancel_reason = 'declined' AND owner IS NOT NULL;
CREATE INDEX CONCURRENTLY IF NOT EXISTS bookings_declined_by_network ON bookings (network, pending_since)
    WHERE cancel_reason = 'declined' AND network IS NOT NULL;
