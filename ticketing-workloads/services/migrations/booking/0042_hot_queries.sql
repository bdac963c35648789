-- For the queries that are made all the time or over old rows. Built beside buyers: no lock that a booking meets.
-- The list of events, oldest first, without a category.
CREATE INDEX CONCURRENTLY IF NOT EXISTS events_by_age ON events (created_at, id);
-- Mails that wait: from one domain to the next, past however many mails to each.
CREATE INDEX CONCURRENTLY IF NOT EXISTS outbox_open_by_domain ON outbox (kind, domain, next_at, id) WHERE done_at IS NULL;
-- Mails that were sent, and reservations that ran out or were given back: they are deleted when they are old.
CREATE INDEX CONCURRENTLY IF NOT EXISTS outbox_done ON outbox (done_at) WHERE done_at IS NOT NULL;
CREATE INDEX CONCURRENTLY IF NOT EXISTS bookings_ended ON bookings (created_at)
    WHERE status = 'Cancelled' AND cancel_reason IN ('expired', 'given back');
-- Payments that are old enough to be deleted.
CREATE INDEX CONCURRENTLY IF NOT EXISTS payments_by_age ON payments (created_at);
