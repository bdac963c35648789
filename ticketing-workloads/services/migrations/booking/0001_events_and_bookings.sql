-- Events carry a version for optimistic locking. `available` is kept beside the bookings, so that selling a ticket
-- touches one row; the check booking-consistency compares the two.
CREATE TABLE events (
    id         uuid PRIMARY KEY,
    name       text NOT NULL,
    capacity   integer NOT NULL CHECK (capacity >= 0),
    available  integer NOT NULL CHECK (available BETWEEN 0 AND capacity),
    version    bigint NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE bookings (
    id              uuid PRIMARY KEY,
    event_id        uuid NOT NULL REFERENCES events (id),
    user_id         text NOT NULL,
    ticket_count    integer NOT NULL CHECK (ticket_count BETWEEN 1 AND 10),
    status          text NOT NULL CHECK (status IN ('Held', 'Confirmed', 'Cancelled')),
    idempotency_key text NOT NULL UNIQUE,
    held_until      timestamptz,
    created_at      timestamptz NOT NULL DEFAULT now(),
    CHECK ((status = 'Held') = (held_until IS NOT NULL))
);

-- For the sum of sold tickets per event.
CREATE INDEX bookings_by_event ON bookings (event_id) INCLUDE (ticket_count) WHERE status <> 'Cancelled';
-- For holds that have run out.
CREATE INDEX bookings_by_hold ON bookings (held_until) WHERE status = 'Held';
