-- How the outbox is worked off. `sending` is set right before a mail leaves: only then may a kill make a second one.
ALTER TABLE outbox
    DROP CONSTRAINT outbox_kind_check,
    ADD CONSTRAINT outbox_kind_check CHECK (kind IN ('BookingConfirmed', 'Ticket')),
    ADD COLUMN next_at       timestamptz NOT NULL DEFAULT now(),
    ADD COLUMN claim         uuid,
    ADD COLUMN claimed_until timestamptz,
    ADD COLUMN tries         integer NOT NULL DEFAULT 0,
    ADD COLUMN sending       boolean NOT NULL DEFAULT false,
    ADD COLUMN done_at       timestamptz;

CREATE INDEX outbox_open ON outbox (next_at, id) WHERE done_at IS NULL;

-- What can never be sent, and why. A person looks at it; it blocks nothing.
CREATE TABLE dead_letters (
    outbox_id  bigint PRIMARY KEY REFERENCES outbox (id),
    reason     text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
