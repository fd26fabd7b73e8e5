(** Matching the MLP output does not match the block, but the site can

    Base block output x + y, tuned block output x' + y' (skip part, MLP part).

    Claims, exact.
      - A steer at mlp_out that turns y into y' leaves the block short by exactly
        x' - x, the shift of the skip part.
      - A free steer at mlp_out, D = (x' + y') - (x + y), closes the gap: for a free
        vector per token the two sites reach the same block outputs.

    So what a site can *write* is the same; "coverage" is about the target one fits to,
    and about what the steer may *read*.

    Assumptions.  No norm between mlp_out and the residual stream. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Equiv Require Import basics.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import GRing.Theory.
Local Open Scope ring_scope.

Section Coverage.
Variable V : zmodType.
Implicit Types x y D : V.

(** y + D = y' leaves the gap x' - x. *)
Theorem matching_mlp_leaves_skip x y x' y' D :
  y + D = y' -> (x' + y') - (x + (y + D)) = x' - x.
Proof. by move=> ->; rewrite opprD addrACA subrr addr0. Qed.

(** D = (x' + y') - (x + y) closes it, and is the only one that does. *)
Theorem free_mlp_out_steer x y x' y' D :
  x + (y + D) = x' + y' <-> D = (x' + y') - (x + y).
Proof. by rewrite addrA; split=> [<-|->]; [rewrite addrC addKr|rewrite addrC subrK]. Qed.
End Coverage.
