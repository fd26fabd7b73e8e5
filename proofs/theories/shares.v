(** What was added can be told from the sum

    The columns of S (N x L) are L shifts; S c is their sum with shares c.  When an
    update was applied layer by layer, some of it wrongly, c says how much of each.

    Claim.  If the columns of S are linearly independent, S c = S c' only for c = c'.

    Not said here.  The shift of a model is such a sum only approximately; how well c
    is found from it depends on the conditioning of S. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Equiv Require Import basics.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(** Linearly independent columns of S: the sum S c determines the shares c. *)
Theorem shares_determined (F : fieldType) N L (S : 'M[F]_(N, L)) (c c' : 'cV_L) :
  \rank S = L -> S *m c = S *m c' -> c = c'.
Proof.
move=> rS E; have full : row_full S by rewrite /row_full rS.
by rewrite -[c]mul1mx -[c']mul1mx -(mulVpmx full) -!mulmxA E.
Qed.
