-- Bookings that somebody has cancelled by hand, for whatever reason, however old: what was charged for them is owed. Built beside
-- buyers.
CREATE INDEX CONCURRENTLY IF NOT EXISTS bookings_cancelled_by_hand ON bookings (created_at, id)
    WHERE status = 'Cancelled'
      AND COALESCE(cancel_reason, '') NOT IN ('declined', 'payment timed out', 'payment unavailable', 'expired', 'given back');
